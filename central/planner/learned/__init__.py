"""The learned planner: a two-stage policy with sparse attention, its environments and its training.

Flow: `observe` turns a state into features -> `network` scores VMs, then places for the chosen VM -> `rollout` samples
trajectories -> `solver` deploys the best. `distill` and `ppo` train; `envs` are the Gymnasium environments.
"""
