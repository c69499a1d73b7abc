/* The public header in a C99 program: compiled with -pedantic -Werror, linked and called from C. */
#include "qgraph/qgraph.h"

int main(void) {
  qg_load_options load = QG_LOAD_OPTIONS_INIT;
  qg_session_options options = QG_SESSION_OPTIONS_INIT;
  qg_model* model = NULL;
  (void)options;
  if (qg_load("/nonexistent", &load, &model) != QG_NOT_FOUND || model != NULL) return 1;
  return qg_last_error()[0] == '/' ? 0 : 1;
}
