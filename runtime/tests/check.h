// The few macros that the tests need. A failed check prints itself and ends the program with status 1.
#ifndef QGRAPH_TESTS_CHECK_H_
#define QGRAPH_TESTS_CHECK_H_

#include <cstdio>
#include <cstdlib>
#include <string>

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (0)

// The expression must throw qg::Error with this text in its message.
#define CHECK_FAILS(expression, text)                                                  \
  do {                                                                                 \
    std::string message = "no error";                                                  \
    try {                                                                              \
      (void)(expression);                                                              \
    } catch (const qg::Error& e) {                                                     \
      message = e.what();                                                              \
    }                                                                                  \
    if (message.find(text) == std::string::npos) {                                     \
      std::fprintf(stderr, "%s:%d: expected \"%s\", got \"%s\"\n", __FILE__, __LINE__, \
                   std::string(text).c_str(), message.c_str());                        \
      std::exit(1);                                                                    \
    }                                                                                  \
  } while (0)

#endif  // QGRAPH_TESTS_CHECK_H_
