"""The least that a round can take in Flower's deployment: an app that imports Flower alone and echoes.

Over FedAvg.start, which looks for replies every 3 s; over messages of one's own, looked for every 0.05 s, as fedlora's
server does; and so with a second message behind each, which keeps a SuperNode from the 3 s of sleep that it goes into
whenever it finds nothing to do.
"""
