"""The command `qroam demo`: a sharded model in several processes, compared with the unsharded one."""
