"""CUDA graphs: a step's launches in one."""
