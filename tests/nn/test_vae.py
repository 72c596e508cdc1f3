"""The action VAE against plain layers, and its KL term."""

from __future__ import annotations

import torch

from offpolicy.nn.vae import ActionVAE, standard_normal_kl


def test_forward_equals_plain_layers() -> None:
    torch.manual_seed(0)
    vae = ActionVAE(3, 2, hidden_dims=(5,)).double()
    obs, action = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    noise = torch.randn(7, 4).double()
    (w0, b0), (w1, b1) = [(layer.weight, layer.bias) for layer in vae.encoder.layers]
    hidden = torch.relu(torch.cat([obs, action], 1) @ w0 + b0)
    mean, log_std = hidden @ w1[:, :4] + b1[:, :4], hidden @ w1[:, 4:] + b1[:, 4:]
    (w0, b0), (w1, b1) = [(layer.weight, layer.bias) for layer in vae.decoder.layers]
    z = mean + log_std.exp() * noise
    expected = torch.tanh(torch.relu(torch.cat([obs, z], 1) @ w0 + b0) @ w1 + b1)
    for ours, theirs in zip(vae(obs, action, noise), (expected, mean, log_std), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_log_std_stays_in_its_bounds() -> None:
    vae = ActionVAE(1, 1, latent_dim=2, hidden_dims=())
    with torch.no_grad():
        vae.encoder.layers[0].weight.zero_()
        vae.encoder.layers[0].bias.copy_(torch.tensor([[0.0, 1.0, -9.0, 20.0]]))
    mean, log_std = vae.encode(torch.zeros(1, 1), torch.zeros(1, 1))
    assert mean.tolist() == [[0.0, 1.0]]
    assert log_std.tolist() == [[-4.0, 15.0]]


def test_kl_known_answers() -> None:
    """μ = 0, σ = 1: 0.  μ = 1, σ = 1: ½.  μ = 0, σ = e: -½(1 + 2 - 0 - e²) = 2.19452805."""
    kl = standard_normal_kl(torch.tensor([0.0, 1.0, 0.0]).double(), torch.tensor([0.0, 0.0, 1.0]).double())
    torch.testing.assert_close(kl, torch.tensor([0.0, 0.5, 2.194528049465325]).double())
