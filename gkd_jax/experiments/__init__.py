"""Grids of runs and reports of what they scored; nothing here needs JAX.

`gkd sweep`: `sweeps` reads a grid's cells, `sweep_runner` runs them as processes.

`gkd report`: `run_folders` reads what runs left in their folders, `studies` turns
it into groups of seeds, `figures`, `figures_behaviour`, `figures_training` (on `panels`) and
`report_tables` show them, and `report_page` writes the page. `metrics` is the table
of metrics to change for a new one; `rendering` fills the `templates`.

`gkd watch`: `watch` shows runs while they train.

`model_card` describes an exported student.
"""
