# ruff: noqa: E501 - programs are easier to compare when each of their lines is one line here
"""Threats that were found after the design's table: each is one case of a kind."""

from threat import FORKING, Threat

LEFTOVERS = [
    *(
        Threat(
            row=f"91-deep-{depth}",
            code=f"import os\nfor _ in range({depth}):\n    os.mkdir('d'); os.chdir('d')\nprint('deep')",
            says="deep\n",
        )
        for depth in (1500, 3000)
    ),
    Threat(
        row="91-deep-in-tmp",
        code="import os, tempfile\nos.chdir(tempfile.gettempdir())\nfor _ in range(1200):\n    os.mkdir('d'); os.chdir('d'); open('f', 'w').close()\nprint('deep')",
        says="deep\n",
    ),
    Threat(
        row="91-closed-folders",
        code="import os\nfor n in range(50):\n    os.makedirs(f'a{n}/b/c')\n    open(f'a{n}/f', 'w').close()\n    os.mkdir(f'a{n}/shut', 0)\nprint('closed')",
        says="closed\n",
    ),
    Threat(
        row="91-closed-everything",
        code="import os\nfor n in range(1200):\n    os.mkdir('d'); os.chdir('d'); os.chmod('..', 0)\nprint('closed')",
        says="closed\n",
        levels=FORKING,
    ),
    Threat(
        row="91-many-files",
        code="import os\nfor n in range(4000): os.close(os.open(f'{n}', os.O_CREAT))\nprint('many')",
        says="many\n",
    ),
    Threat(
        row="91-odd-names",
        code="import os\nos.mkfifo('pipe')\nos.symlink('/', 'root')\nos.symlink('loop', 'loop')\n"
        "for name in (b'\\xff\\xfe', b'a\\nb', b'-rf', b' ', b'x' * 255): os.mkdir(name); os.close(os.open(name + b'/' + name, os.O_CREAT))\nprint('odd')",
        says="odd\n",
    ),
]

FENCE = [*LEFTOVERS]
