"""The files of the demo language model and the script that trained it; README.md beside this file describes them."""
