"""What fedlora costs, measured against what people would otherwise run. Never part of a timed test.

python -m benchmarks.step       one private step: plain PEFT, Opacus hooks, Opacus ghost clipping, fedlora
python -m benchmarks.simulate   one federated job: fedlora's cohort, Flower's engine with our client, and with an
                                example's client
python -m benchmarks.deployed_round  a deployed round beside training: fedlora, Flower's quickstart, and the least that
                                     Flower's deployment takes
python -m benchmarks.deployed_load   fifty sites, one server: does its memory grow?

Machines are shared and noisy, so variants take turns in random order and the figure is a ratio inside one round of
turns. Results go to benchmarks/results as JSON and as a Markdown table, with what is needed to judge them.
"""
