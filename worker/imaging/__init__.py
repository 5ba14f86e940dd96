"""From the stored objects of a study to Hounsfield volumes that can be trusted."""
