"""What each zygote loads and warms before it forks, and how it keeps its forks cheap.

The first call of many library functions builds caches: sympy's `solve` takes 36 ms cold, and 7 ms
in a child of a zygote that has solved something. So each preset runs a few typical operations once.
"""

import contextlib
import functools
import importlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator

from services.tool.sandbox.inside import kernel

# Not all of the standard library: an extension module maps five more ranges of memory, which costs
# 15 us in every fork, and modules with exit functions (logging, multiprocessing, asyncio) cost time
# in every exit. Programs import those themselves.
_COMMON = """
    abc array ast base64 bisect calendar cmath codecs collections collections.abc contextlib copy
    dataclasses datetime decimal difflib enum fractions functools heapq inspect io itertools json
    linecache locale math numbers operator os.path pathlib pprint random re statistics string struct
    sys textwrap time timeit tokenize traceback types typing warnings weakref encodings.ascii
    encodings.latin_1
"""

_HUGE_PAGE = 2 << 20


def load(preset: str, folder: str) -> None:
    """Import one preset on top of what is loaded already, and warm it.

    Args:
        folder: where libraries may write while they are imported; it is gone afterwards.
    """
    os.environ["MPLCONFIGDIR"] = folder  # matplotlib insists on one, for its list of fonts
    _WARM_UPS[preset]()
    del os.environ["MPLCONFIGDIR"]
    if threading.active_count() != 1:
        raise RuntimeError(f"preset {preset} left threads running: a fork would lose them")


def tolerate_refused_attributes() -> None:
    """At level basic, where modes and times of files cannot be set, have the standard library copy
    files and open databases without them."""
    import dbm.dumb
    import shutil

    for owner, name in ((shutil, "copymode"), (shutil, "copystat"), (dbm.dumb._Database, "_chmod")):
        setattr(owner, name, _tolerant(getattr(owner, name)))


def _tolerant(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def call(*arguments: object, **options: object) -> None:
        with contextlib.suppress(PermissionError):
            function(*arguments, **options)

    return call


def collapse_heap(proc: int | None) -> int:
    """Back the interpreter's writable memory by huge pages. Returns the number of ranges."""
    if proc is None:
        return 0
    descriptor = os.open("self/maps", os.O_RDONLY, dir_fd=proc)
    with os.fdopen(descriptor) as file:
        lines = file.read().splitlines()
    taken = 0
    for line in lines:
        fields = line.split()
        low, _, high = fields[0].partition("-")
        start, length = int(low, 16), int(high, 16) - int(low, 16)
        anonymous = len(fields) == 5 or fields[5] == "[heap]"
        if fields[1] == "rw-p" and anonymous and length >= _HUGE_PAGE:
            taken += kernel.collapse(start, length)
    return taken


def _import_if_present(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        return  # optional parts of the standard library, such as sqlite3, may not be built


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Have imports of a library fail while inside."""
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _warm_numpy() -> None:
    for name in _COMMON.split():
        _import_if_present(name)
    import numpy as np

    generator = np.random.default_rng(0)
    matrix = generator.random((8, 8))
    np.linalg.det(matrix)
    np.linalg.solve(matrix, matrix[0])
    np.linalg.eigvals(matrix)
    np.linalg.inv(matrix @ matrix.T)
    np.random.rand(3)
    np.polyfit([0.0, 1.0, 2.0], [0.0, 1.0, 4.0], 2)
    repr(matrix), str(matrix.astype(int)), np.unique(matrix), np.cumsum(matrix), np.sort(matrix)


def _warm_sympy() -> None:
    import sympy as sp

    x, y, n = sp.symbols("x y n")
    k = sp.Symbol("k", integer=True, positive=True)
    str(sp.solve([x + y - 3, x - y - 1], [x, y]))
    str(sp.solve(x**3 - 6 * x**2 + 11 * x - 6, x))
    str(sp.solve(sp.sqrt(x) - 2, x))
    str(sp.solveset(x**2 - 1, x, sp.S.Reals))
    sp.simplify(sp.sin(x) ** 2 + sp.cos(x) ** 2 + (x**2 - 1) / (x - 1))
    sp.limit(sp.sin(x) / x, x, 0)
    sp.diff(sp.exp(x) * sp.sin(x), x)
    sp.integrate(x**2 * sp.sin(x), x)
    sp.integrate(sp.exp(-x), (x, 0, sp.oo))
    sp.summation(1 / (k * (k + 1)), (k, 1, sp.oo))
    sp.series(sp.exp(x), x, 0, 4)
    sp.Matrix([[2, 1], [1, 3]]).eigenvals()
    sp.Matrix([[2, 1], [1, 3]]).inv().det()
    sp.factor(x**4 - 1), sp.expand((x + 1) ** 4)
    sp.apart(1 / (x**2 - 1)), sp.together(1 / x + 1 / y)
    sp.factorint(360), sp.isprime(97), sp.divisors(60), sp.gcd(12, 18), sp.binomial(n, 2)
    sp.nsimplify(0.5), sp.N(sp.pi, 20), sp.latex(sp.sqrt(x) / 2), str(sp.Rational(1, 3))
    sp.sympify("x**2 + 1"), sp.nsolve(x**2 - 2, 1)


def _warm_scipy() -> None:
    import numpy as np
    import sympy
    from scipy import integrate, linalg, optimize, special, stats

    optimize.minimize(lambda v: float((v**2).sum()), np.array([1.0, 2.0]))
    optimize.brentq(lambda v: v - 1.0, 0.0, 2.0)
    integrate.quad(lambda v: v * v, 0.0, 1.0)
    linalg.expm(np.eye(2))
    special.comb(10, 3)
    stats.norm.cdf(0.0)
    sympy.lambdify(sympy.Symbol("x"), 1)(2)  # imports scipy by itself, and much else


def _warm_pandas() -> None:
    # pyarrow, which pandas imports if it is there, starts a thread that forks would lose. Programs
    # can still import it, and pandas then uses it for its files.
    with _hidden("pyarrow"):
        import pandas as pd
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": ["x", "y", "x"]})
    frame["c"] = pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-03"])
    repr(frame), repr(frame["a"]), frame.describe().to_string()
    frame.groupby("b")["a"].mean(), frame.merge(frame, on="a"), frame.sort_values("a")
    frame.pivot_table(index="b", values="a"), frame[frame["a"] > 1].to_csv()
    pd.read_csv(io.StringIO("a,b\n1,2\n"))


def _warm_matplotlib() -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1], label="$x^2$")
    axes.set(title="title", xlabel="x", ylabel="y")
    axes.legend()
    figure.savefig(io.BytesIO(), format="png")
    plt.close(figure)


_WARM_UPS = {
    "numpy": _warm_numpy,
    "sympy": _warm_sympy,
    "scipy": _warm_scipy,
    "pandas": _warm_pandas,
    "matplotlib": _warm_matplotlib,
}
