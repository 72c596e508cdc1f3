"""Variants that change which answers are learned from, and methods with a store or a gate of their own."""

from __future__ import annotations

from typing import Any

from offpolicy.losses.variants.row import Variant

DAPO: dict[str, Any] = {"aggregation": "token_mean", "trust": {"name": "ppo", "low": 0.2, "high": 0.28}}

ROWS = (
    Variant(
        "hpt",
        "HPT",
        "2509.04419",
        "s right answers ≤ gate: −log π of the demonstration; else −ρ(R − μ) of the own answers; no clipping",
        {
            "advantage": "hybrid",
            "trust": "none",
            "aggregation": "dr_grpo",
            "terms": ({"name": "hybrid_sft", "coef": 1.0},),
            "entropy": {"name": "bonus", "coef": 1e-3, "aggregation": "token_mean"},
        },
        method="HPT",
        differs="the code sums over answers and takes the mean of demonstrations per micro-batch; here both are means "
        "of the step, and sum_over_T is `aggregation`",
        unverified="what the code's `gate_off` takes for the advantage of a demonstration beside own answers",
        off_policy="the gate holds for the iteration that drew the answers",
        needs="demonstrations,vocabulary",
    ),
    Variant(
        "spear",
        "SPEAR",
        "2509.22601",
        "J + γ(t)·J_replay: stored successes come back with R − P50, the ratio to their own policy, and Clip-Cov",
        {
            "advantage": "dr_grpo",
            "trust": "replayed_clip_cov",
            "aggregation": "dr_grpo",
            "weight": ("stored",),
        },
        {"filter": [{"name": "spread", "keep": 0.75}]},
        method="SPEAR",
        differs="the code sums over tokens without the number of answers (`aggregation` sum_over_T); no tools, so no "
        "reward for calling them",
        unverified="the coefficient after the ramp, taken for 1",
    ),
    Variant(
        "dapo_full",
        "DAPO, with its filters",
        "2503.14476",
        "as dapo; groups without signal are dropped and drawn again, cut answers count in no mean",
        DAPO,
        {"filter": ["signal", "ended"]},
        differs="where ten rounds do not fill an iteration the code gives up; here dropped groups fill it up",
    ),
    Variant(
        "d3s_answers",
        "D³S, answers",
        "2509.22115",
        "the subset of answers whose advantages have the largest variance",
        {},
        {"filter": [{"name": "variance", "keep": 0.5}]},
        unverified="shares of the schedule; whether the subset is of a group or of all answers (here all)",
    ),
    Variant(
        "ssb",
        "Skywork R1V2, selective sample buffer",
        "2504.16656",
        "old groups come back with a probability in proportion to |A|, without answers of no advantage",
        {},
        {"replay": "ssb", "replay_fraction": 0.25, "replay_window": 4},
        differs="the buffer holds answers there and whole groups here",
        unverified="the proportion to |A| itself, share and window",
    ),
    Variant(
        "exgrpo",
        "ExGRPO, its choice of answers",
        "2510.02245",
        "old groups by exp(−(p − ½)²/2σ²) of their success rate p, of each the likeliest right answer",
        {},
        {"replay": "exgrpo", "replay_fraction": 0.25, "replay_window": 4},
        differs="an answer keeps its advantage here and joins new answers there; no entropy of the policy of now",
        unverified="σ, share and window",
    ),
    Variant(
        "r3",
        "R³, its replay",
        "no arXiv number known",
        "a new group without success gets a stored success of the same problem in place of its last answer",
        {},
        {"replay": "r3"},
        unverified="all but the idea, known from a summary; no reflection prompts, no ranking of failures",
    ),
    Variant(
        "ttrl",
        "TTRL",
        "2504.16084",
        "R = 1 for the answer that most of the group give",
        {},
        {"rewards": ["majority"]},
    ),
    Variant(
        "empo",
        "EMPO, on answers",
        "2504.05812",
        "R = share of the group that gives the same answer, within a band of entropy",
        {},
        {"rewards": ["agreement"]},
        differs="clusters are equal answers here, of one meaning there",
        unverified="the thresholds of the band; none by default",
    ),
    Variant(
        "evol_rl",
        "EVOL-RL, without its embedder",
        "2509.15194",
        "R = ½ to 1 for the majority, −1 to −½ for others, by novelty; clip-higher, entropy bonus",
        {
            "trust": {"name": "ppo", "low": 0.2, "high": 0.28},
            "entropy": {"name": "bonus", "coef": 3e-3},
        },
        {"rewards": ["majority_novelty"]},
        differs="novelty by word pairs in common here, by embeddings there",
        unverified="the weight of mean and largest similarity, and the coefficient of the entropy",
        needs="vocabulary",
    ),
    Variant(
        "rl_struct",
        "RL-Struct",
        "no arXiv number known",
        "R = weighted mean of format, validity, keys and values of a JSON answer",
        {},
        {"rewards": ["structure"]},
        unverified="the weights",
    ),
    Variant(
        "siri",
        "SIRI",
        "2509.25176",
        "the longest answer falls and rises along a cosine of the iteration",
        {},
        {"length_cycle": {"low": 0.5, "iterations": 100}},
        unverified="the lengths and the cycle; low is a share of max_new_tokens",
    ),
    Variant(
        "prompt_augmentation",
        "Prompt augmentation",
        "no arXiv number known",
        "each group of answers is asked in one of several templates; no divergence from the base",
        {},
        {
            "templates": [
                "{prompt}\nSolve the problem step by step and end with the answer alone in \\boxed{}.\n",
                "Plan first, then work the plan out. End with the answer alone in \\boxed{}.\n{prompt}\n",
                "{prompt}\nWork it out, check the result, and end with the answer alone in \\boxed{}.\n",
            ]
        },
        unverified="all but the idea; the three templates are ours, and there is no reward for the format of each",
    ),
    Variant(
        "scaf_grpo",
        "Scaf-GRPO",
        "2510.19807",
        "a group of a problem that stays unsolved gets a right answer behind a hint, of three tiers the first that "
        "helps, in the place of a failed one",
        {},
        {"hints": {"name": "scaffold", "tiers": [0.25, 0.5, 0.75], "patience": 2}},
        differs="hints are written by a stronger model there; here they are columns of the data or, by default, the "
        "beginning of the solution",
        unverified="the tiers, the patience, and which failed answer goes (the last here)",
    ),
    Variant(
        "sage",
        "SAGE",
        "2602.03143",
        "a problem that failed is asked behind a hint, which the policy of now writes from the solution; the ratio is "
        "that behind the hint; none in evaluations",
        {},
        {"hints": {"name": "written", "patience": 1}},
        differs="the code writes three hints to a failed group, each of which says more, and draws the group again "
        "behind one after the other until an answer is right, in one iteration; SAGE-light waits for the next time, "
        "as here, and says more where at most 0.1 of the answers were right, less above 0.35: here where none was, and "
        "where one was. There the instruction alone keeps the answer out. Neither learns to write hints",
        unverified="the paper, of which the abstract and the code were read; the instruction and its tiers are ours",
    ),
    Variant(
        "vade",
        "VADE",
        "no arXiv number known",
        "Beta(α, β) of each problem's success rate p; asked are the largest p(1 − p) of a draw; α, β decay",
        {},
        {"curriculum": "vade"},
        unverified="both factors of the decay, and where each applies; texts without images here",
    ),
    Variant(
        "gain_rl",
        "GAIN-RL",
        "2506.02281",
        "problems ranked by the mean cosine of their tokens' states, drawn by a Gaussian that moves with the accuracy",
        {},
        {"curriculum": "gain"},
        differs="the code adds eight times the cosines between question and template, takes the input of the last MLP, "
        "and takes them anew with the answers; here the last states of the prompt, once",
        unverified="the paper's constants; those of its code stand here, for some ten thousand problems",
    ),
    Variant(
        "score",
        "SCoRe",
        "2409.12917",
        "two answers; first r₂ for the second alone and a divergence on the first, then r₁, and r₂ + α(r₂ − r₁)",
        {
            "trust": "none",
            "aggregation": "seq_sum",
            "anchors": ({"name": "k3", "coef": 0.01}, {"name": "turn_kl", "coef": 0.1}),
        },
        {"correction": "score"},
        differs="the first answer is rewarded by its own reward alone, and a turn's baseline is its group's mean",
        unverified="α, both coefficients, the length of the first stage and the instruction; evaluations have one turn",
        off_policy="answers with two turns are not kept",
        needs="base",
    ),
)
