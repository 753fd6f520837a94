"""Routed queries and their answers between GPUs, over memory that every rank can write to.

`layout` says where messages lie, `types` what goes in and out, `signals` how a CTA learns that data
is there, `roles` what CTAs do (send, accept, answer, receive), and `launch` launches them;
`nvshmem_put` is for peers whose memory cannot be stored to.
"""
