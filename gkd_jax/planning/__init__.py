"""`gkd precompile`: what a run needs of devices, attached or not.

`topologies` describes devices and the rates of their chips. `precompile` compiles
a run's programs for them; `program_files` stores these, `hlo` parses their text,
`costs` counts it and `program_report` reports memory, work and least time.
"""
