"""Arithmetic and packing: each verb's definition in plain torch, kernels beside their launchers."""
