"""The command line: parser, help, and how a command ends."""

from offpolicy.moved import names_of

__getattr__ = names_of("offpolicy.cli")  # the names of the former module
