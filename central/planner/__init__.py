"""The migration planner: a mapping of VMs to PMs in, a checked and executable list of moves out.

Flow: `formats` reads a mapping -> `model` holds it as frozen data and, for solvers, as arrays -> a solver proposes
moves -> `checker` replays them, sharing no code with any solver -> `formats` writes the plan.

Words: PM physical machine, VM virtual machine, node one NUMA node of a PM, slot one more request (16 cores on one
node unless the objective says otherwise) that fits, fragment rate (FR) the share of free cores that no slot can use,
MNL the limit on the number of moves.
"""
