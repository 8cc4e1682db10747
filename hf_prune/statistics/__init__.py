"""What is measured on calibration batches: one streamed pass, and the moments of a re-fit."""
