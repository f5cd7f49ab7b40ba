"""UniGRPO's mathematics (arXiv 2603.23500): tensors in, tensors out.

Nothing here knows a model, a file, a device, a rank or a logger. Randomness and denominators are arguments.

Direction of time, said once: **t = 1 is noise, t = 0 is data.** A noisy latent is x_t = (1 - t) x_0 + t e
with e ~ N(0, I); its velocity is v = e - x_0; sampling runs t downwards, so dt = t_next - t < 0.

Shape letters, in every name: P prompts, G members of a group, B = P * G episodes, L text actions (padded),
K stochastic image steps, N image tokens of D numbers, V vocabulary, T points of the time grid.

| paper (eq)                                   | here                            |
|----------------------------------------------|---------------------------------|
| 1  group-relative advantage                  | `advantage.group_advantage`     |
| 2  text objective, clipped token ratios      | `objective.text_term`           |
| 3  stochastic transition of the flow         | `flow.transition`, `flow.step`  |
| 4-5  RatioNorm                               | `flow.ratio_norm`               |
| 6  image objective, clipped step ratios      | `objective.image_term`          |
| 7  joint objective with lambda               | `objective.unigrpo_loss`        |
| 8  velocity penalty against the start        | `flow.velocity_mse`             |
| -  FPO, the baseline; DiffusionNFT           | `forward.fpo_log_ratio`, `forward.nft_loss` |
"""
