"""The execution core: processes, kernel fences and the small protocols between them.

    host/    API process (asyncio, secrets, queue)        pool.py, slots.py, execution.py
               | one SOCK_SEQPACKET pair per zygote       channel.py
    inside/  launcher (own program, clean environment)    launcher.py
               +- factory, pid 1 of the outer namespaces  launcher.py
                    +- zygote: numpy [+ sympy [+ scipy]]  zygote.py
                    |    +- slot: fenced, takes one job   slot.py
                    |         runs one program            snippet/program.py
                    |         or supervises a session     supervisor.py
                    +- room: pid 1 of one slot's own namespaces

The API process and a slot speak through the slot's own socket (wire.py); the zygotes never see a
request. `inside` never imports `host`. It imports the standard library, the bindings of libseccomp
and Landlock, plan.py, wire.py and channel.py only: its modules are loaded before the root directory
changes and every process below the launcher inherits them by fork.
"""
