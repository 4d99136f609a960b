"""What fedlora costs, measured against what people would otherwise run. Never part of a timed test.

README.md lists the benchmarks, one command each. Machines are shared and noisy, so variants take turns in random order
and the figure is a ratio inside one round of turns. Results go to benchmarks/results as JSON and as a Markdown table,
with what is needed to judge them.
"""
