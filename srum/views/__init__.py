"""What people look at: the report of a run, its plots, notebooks' views, tables, the page to try a run."""
