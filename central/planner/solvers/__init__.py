"""Ways to make a plan. Each is `(Problem, Deadline, seed) -> Solution`; `registry` names them."""
