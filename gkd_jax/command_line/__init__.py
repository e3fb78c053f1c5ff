"""The command line: its commands and flags, and their help. Imports no jax.

commands: the commands, their flags, and what a value of each is.
arguments: the words of a command line, checked.
gin_files: finds gin files, and reads them as text.
gin_settings: parses gin files, and checks what they leave open.
help_pages: `gkd --help` and `gkd COMMAND --help`, with the macros of gin files.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.command_line.arguments import (
    parse,
    shell_line,
  )
  from gkd_jax.command_line.commands import (
    COMMANDS,
    FLAGS,
  )
  from gkd_jax.command_line.help_pages import (
    of_all,
    of_command,
    of_run,
    version,
  )
