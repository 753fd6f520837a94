"""Engines that embed qroam, one module each."""
