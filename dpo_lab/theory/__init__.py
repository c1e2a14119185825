"""The objective, its optimum and the Bradley-Terry model, on finite distributions and in sympy."""
