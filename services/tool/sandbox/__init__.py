"""The execution core: processes, kernel fences and the little protocol between them.

    API process (asyncio, secrets, queue)            engine.py, execution.py
      | one SOCK_SEQPACKET pair per zygote
    launcher (exec'd, clean environment)             launcher.py
      +- factory, pid 1 of the outer pid namespace   launcher.py
           +- zygote: numpy [+ sympy [+ scipy]]      zygote.py
           |    +- slot: isolated, waits for a job   slot.py -> harness.py / keeper.py
           +- slot init, pid 1 of the slot's own pid namespace

Modules used below the launcher (kernel, wire, launcher, zygote, slot, harness, keeper, filesystem)
import the standard library and py_landlock only: they are loaded before the root directory changes
and are inherited by fork.
"""
