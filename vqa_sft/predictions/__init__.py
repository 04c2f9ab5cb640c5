"""The prediction file and all that follows from it: metrics, calibration, ensembles, submissions. No torch.

Import from here: `file.read_predictions`, `file.write_predictions`, `metrics`, `calibration`.
May import: config, batch, data.
"""
