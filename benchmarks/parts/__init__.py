"""What is measured, one part a file. A part writes a record; tables and plots are made from records alone."""
