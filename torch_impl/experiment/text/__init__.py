"""Text for calibration, fine-tuning and evaluation.

sources.py and files.py read documents. records.py converts instruction and chat records. splitting.py keeps evaluation text
out of the training text. windows.py cuts token windows and examples, for evaluation by the protocols of protocols.py.
"""
