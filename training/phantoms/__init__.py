"""PhantomCT: synthetic CTs whose findings are known, the reports of them, and a labeler that reads the reports back."""
