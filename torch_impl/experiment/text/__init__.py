"""Text for calibration, fine-tuning and evaluation: read from its sources, kept apart, cut into windows of tokens.

sources.py and files.py read documents, records.py makes them of instruction and chat records, splitting.py keeps what is
measured out of what is trained on, windows.py cuts token windows and examples.
"""
