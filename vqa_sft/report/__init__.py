"""Pages to look at: templates and plots. No torch. May import: predictions, config, batch, data."""
