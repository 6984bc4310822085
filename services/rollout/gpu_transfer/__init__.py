"""Weights straight from the learner's GPU, over NCCL or CUDA IPC: THIS HAS NEVER RUN ON A GPU.

The tests run vLLM's transfer engines at both ends on CPU, through the real service and into real
vLLM workers, with replacements for NCCL's broadcast and for CUDA IPC. Use the transport `file` or
`http` unless you are ready to debug.

    link.py      the service's end: open, receive, close
    receiver.py  the workers' end: joins the group and writes what arrives to a file
"""
