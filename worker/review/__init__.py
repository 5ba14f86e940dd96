"""The review page: radiologists read, correct and sign drafts in a browser."""
