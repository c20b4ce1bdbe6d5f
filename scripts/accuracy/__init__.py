"""What ``scripts/accuracy_study.py`` is made of: peer methods, studies, statistics, tables and plots."""
