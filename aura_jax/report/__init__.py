"""The report of a run: what a workdir tells, collected into one dictionary, drawn, and written as one page."""
