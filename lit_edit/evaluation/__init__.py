"""What is measured: reliability, generalization, locality, and general abilities."""
