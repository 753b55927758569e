"""The command line: parse → call `lm` → show. One file a command, in `cli/commands/`."""
