"""Eight episodes of two states and two actions, of which the estimates of policy evaluation are known.

``S A R S2``: state, action, reward and next state of every step, (N,); the next state 2 is terminal.
"""

from __future__ import annotations

import numpy as np

EPISODES = [
    [(1, 0, -0.2, 2)],
    [(0, 0, 0.5, 0)] * 4,
    [(0, 0, 0.5, 1), (1, 0, -0.2, 2)],
    [(1, 1, 2, 2)],
    [(0, 0, 0.5, 0), (0, 1, 0, 1), (1, 0, -0.2, 1), (1, 0, -0.2, 0)],
    [(0, 0, 0.5, 0), (0, 0, 0.5, 0), (0, 1, 0, 2)],
    [(0, 0, 0.5, 0), (0, 1, 0, 1), (1, 0, -0.2, 0), (0, 1, 0, 1)],
    [(0, 1, 0, 2)],
]
S, A, R, S2 = (np.array(x) for x in zip(*(step for episode in EPISODES for step in episode)))
