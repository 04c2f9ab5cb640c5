"""`vqa-sft COMMAND`: the command line, a thin shell over the other packages, one module for each group of commands.

main.py        the program: parses, and ends with 2 and one message where the use or the input is wrong
runs.py        train, predict; export, soup, push; memory, blind
data.py        check, folds
predictions.py score, report, calibrate, ensemble, submit, diff, uncertainty, label-errors
options.py     options that several commands share

Nobody imports it. Commands import the packages that they call, so that `--help` waits for none of them.
"""
