"""A causal language model that writes and a diffusers painter that its states condition, as one policy."""
