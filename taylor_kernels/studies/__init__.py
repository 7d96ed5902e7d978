"""Tables, plots and pages that compare networks: one folder a study."""
