"""Sources, view specifications, sample order and DALI pipelines."""
