"""The prediction file and everything made from it: metrics, calibration, ensembles, submissions. No torch.

A command is a module of its name (score, ensemble, compare, uncertainty; calibration for `calibrate`, submission for
`submit`). What they share: `file`, `matched` (data of the same rows), `fit_calibration`, `pooling`, `metrics`, `style`.
May be imported: all of them. May import: config, batch, data and the shared files.
"""
