"""Diffusion: sampler, pools of synthetic trajectories, and measures of them."""

from offpolicy.moved import names_of

__getattr__ = names_of("offpolicy.diffusion")  # the names of the former module
