"""Language models as policies: tokens, log-probabilities, reference, generation."""
