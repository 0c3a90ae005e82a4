"""sRLA, the agent that learns thresholds: DDPG (`ddpg`) on what reports tell (`encoding`), with actions around a base.

`environment` simulates, `training` trains there, `policy` uses trained weights, `online` goes on learning in central.
"""
