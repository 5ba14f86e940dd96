"""PhantomCT: synthetic CTs whose findings are known, the reports of them, and a labeler that reads the reports back.

A case is drawn first (`disease.draw_case`: body, scan and findings as numbers), then painted (`phantom.render`) and written about
(`report.write`). PhantomCT says whether a model learns; it says nothing about patients.
"""
