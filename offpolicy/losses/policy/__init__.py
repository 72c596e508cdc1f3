"""The parts that a policy-gradient objective is composed of, by slot: one small class per component.

Let ℓ = log π_θ, ℓ_k that of the policy at the start of the iteration, ℓ_b that of the policy that sampled the token.
Log-ratios are clamped to ±20. Tensors are (B, T), as in :class:`offpolicy.losses.tokens.Tokens`. Parameters are checked
when a component is made.
"""
