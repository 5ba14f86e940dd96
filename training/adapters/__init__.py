"""Public data sets to manifests: one file a data set, each from its published folder layout."""
