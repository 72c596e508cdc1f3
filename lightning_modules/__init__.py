"""The methods: one file each. This table is read without importing any of them.

Other packages add methods through the entry-point group ``offpolicy.methods`` (name → ``package.module:Class``).
"""

__offpolicy__ = True  # marks these as the library's own packages; another distribution could use the name

METHODS = {
    "BC": "bc",
    "TD3BC": "td3bc",
    "IQL": "iql",
    "PRDC": "prdc",
    "A2PR": "a2pr",
    "ODICE": "odice",
    "CQL": "cql",
    "AWAC": "awac",
    "ReBRAC": "rebrac",
    "SAC": "sac",
    "TD3": "td3",
    "EDAC": "edac",
    "SACN": "edac",
    "RAVL": "ravl",
    "MBPO": "ravl",
    "DecisionTransformer": "decision_transformer",
    "WorldModel": "world_model",
    "FQE": "fqe",
    "TrajectoryDiffusion": "trajectory_diffusion",
    "OTA": "ota",
    "HIQL": "hiql",
    "GCIVL": "gcivl",
    "GCIQL": "gciql",
    "GCBC": "gcbc",
    "SFT": "sft",
    "DPO": "dpo",
    "CDPO": "rdpo",
    "RDPO": "rdpo",
    "RPO": "rpo",
    "IPO": "ipo",
    "INPO": "inpo",
    "SimPO": "simpo",
    "CPO": "cpo",
    "ORPO": "orpo",
    "KTO": "kto",
    "GRPO": "grpo",
    "ReMix": "remix",
    "RLPlus": "rl_plus",
    "HPT": "hpt",
}
