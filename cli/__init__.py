"""The command lines: parse, build options, call one library function, render."""
