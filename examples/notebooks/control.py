"""Control from Python, cell by cell: data, training, acting, Lightning's Trainer, a loss by itself."""

# %% Data: a known name, a file, or arrays. The report says what was found.
import offpolicy as op

data = op.load_data("pendulum-stitch-v0")
print(data.replay)

# %% Train. Everything the command line does, from Python; the run folder has metrics, checkpoints and a curve.
method = op.TD3BC(alpha=10.0, hidden_dims=(64, 64), actor_lr=1e-3, critic_lr=1e-3, reward_transform="0.1r")
run = op.fit(method, data, max_steps=1000, seed=0, eval_every=500, eval_episodes=2, threads=1)
print(run.folder)

# %% Act: NumPy or tensors, one observation or many.
print(run.method.act(data.replay.steps["obs"][0]))

# %% Load it again, without the data.
again = op.load(run.folder)
print(again.act(data.replay.steps["obs"][:3]))

# %% The same with Lightning's own Trainer.
from lightning.pytorch import Trainer  # noqa: E402

trainer = Trainer(max_steps=50, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(op.BC(hidden_dims=(64, 64)), data)
print(trainer.global_step, {k: round(float(v), 3) for k, v in trainer.callback_metrics.items()})

# %% A loss on a batch of yours: build from sizes, load weights if you have them, pass the batch with its noise.
import torch  # noqa: E402

fresh = op.TD3BC(hidden_dims=(64, 64)).initialize(op.Sizes(obs_dim=3, action_dim=1), seed=0)
batch = op.Transitions(
    obs=torch.randn(4, 3),
    action=torch.zeros(4, 1),
    reward=torch.ones(4),
    next_obs=torch.randn(4, 3),
    terminated=torch.tensor([False, False, False, True]),
    noise=op.Noise(target=torch.zeros(4, 1)),
)
loss, metrics = fresh.critic_loss(batch)
print(float(loss), metrics)
